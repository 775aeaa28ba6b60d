"""The failure of one attempt in a search."""

from __future__ import annotations

from outgrow.model.base.errors import UserError


class Unfit(UserError):
    """A twin, a draft or a miniature growth that was tried and does not fit: the search tries the next one.

    Only searches raise and catch it, so that no other fault is taken for a failed attempt. Where every
    attempt fails, the last message reaches the user as a `UserError`.
    """
