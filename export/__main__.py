"""``python -m export``."""

import sys

try:
    from export.cli import main
except ModuleNotFoundError as error:
    print(f"export: {error.name} is not installed: pip install 'edge-llm[export-lite,cpu]'", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
