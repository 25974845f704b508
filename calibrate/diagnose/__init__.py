"""From the logs of one or two runs to what is wrong with them. Standard library only: it runs where nothing is installed.

logs.py reads, settings.py knows the words of training configs, shape.py measures curves, causes.py and hygiene.py
turn curves and settings into evidence, verdict.py weighs it. Nothing here starts a run.
"""
