"""``python -m evolve_dag`` is ``evolve``."""

from evolve_dag.cli import main

if __name__ == "__main__":
    main()
