"""The program in which untrusted answers are run and checked: `python _confined ORDER`, standard library only.

It runs by itself, as a script, so that it starts in some ten milliseconds and shares nothing with the trainer.
"""
