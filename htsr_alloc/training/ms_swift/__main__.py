"""Print the path of the plugin's file."""

from pathlib import Path

print(Path(__file__).with_name("plugin.py"))
