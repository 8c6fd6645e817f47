"""`python -m loadgen.locusts`: Locust with the options that gameday gives it, and no others.

A `run-time` in somebody's ~/.locust.conf, or in a pyproject.toml that happens to be here, would end our load.
"""

from __future__ import annotations

import sys

from locust import argument_parser, main

if __name__ == "__main__":
    alone = argument_parser.get_empty_argument_parser
    argument_parser.get_empty_argument_parser = lambda add_help=True, **_: alone(add_help, default_config_files=())
    sys.exit(main.main())
