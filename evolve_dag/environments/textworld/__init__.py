"""TextWorld's games as an environment (extra ``textworld``): families of games by seed, no file, no network, no key."""
