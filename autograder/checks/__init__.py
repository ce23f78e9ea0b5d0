"""One file a topic: its exercises, each with checks, misconceptions and correct variants."""
