"""Textbooks and exercises written by a language model: prompts from topic × audience × template, answered,
counted, resumable.

settings   what is asked for     prompts   the prompt of a number     server, local   who answers
ledger     what is on disk       run       `write`: all of it
"""
