"""``python -m ray_app``: the command line, for processes that know their Python, not its PATH."""

from ray_app.cli import main

if __name__ == "__main__":
    main()
