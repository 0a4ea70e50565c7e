"""Who does what in a round: protocols, and the seeded draw of a round's cohort."""
