"""What the paper compares with, one file each: a method is the object METHOD of its file (see `loki.method`)."""
