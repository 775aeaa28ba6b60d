"""The engine: a plan executed block by block in bounded memory, to the same bits for any threads, shards,
hosts.
"""
