"""`python -m smelt` and the `smelt` command."""

from .cli import main

if __name__ == "__main__":
    main()
