"""``python -m mllm``: the command line."""

from mllm.cli import main

if __name__ == "__main__":
    main()
