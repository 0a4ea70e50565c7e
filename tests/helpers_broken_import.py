"""A module of a user's that cannot be imported, and no ImportError says so."""

raise KeyError("no such setting")
