"""`python -m cuflash`: the command line, the same as the `cuflash` script."""

from cuflash.cli import main

if __name__ == "__main__":
    main()
