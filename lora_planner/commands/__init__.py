"""Commands that have a file of their own; each is light to import and does its work in its body."""
