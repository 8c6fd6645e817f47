"""Loads the plugin where the project is not installed; where it is, its entry point has done so already."""

pytest_plugins = ["gameday.plugin"]
