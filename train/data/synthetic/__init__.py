"""Textbook sections and exercises without a language model: problems drawn from tables, set in templates, every program run.

operation, lists, sums, digits, texts, tables   what a program can do, each written as a loop and as an expression
themes      where it plays, for whom       problem    operations in a row, with cases
exercises, textbooks   templates           sandbox, worker   programs, run      corpus   a stream of documents
"""
