"""Where instruction samples come from: files of conversations, streams, embedded data."""
