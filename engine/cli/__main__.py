"""`python -m engine.cli` is `m3d`."""

from engine.cli.entry import main

if __name__ == "__main__":
    main()
