"""Textbook sections and exercises without a language model: problems drawn from tables, set in templates,
every program run.

operation             what a program can do, written as a loop and as an expression
themes                where it plays, for whom
tables/               the operations and themes themselves, as data
problem               operations in a row, with cases
exercises, textbooks  templates
checker, worker       programs, run
corpus                a stream of documents
"""
