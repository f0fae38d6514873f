"""`python -m canopy`: the command line, where only the checkout is there."""

from canopy.cli.main import main

if __name__ == "__main__":
    main()
