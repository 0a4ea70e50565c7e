"""The federation: server, clients, rounds, checkpoints. The only room that imports Flower."""
