"""The door of the corpus under its former name: `python -m train.data prepare …` is `outgrow corpus prepare
…`."""

from outgrow.model.base.interrupt import started
from outgrow.train.corpus.__main__ import main

if __name__ == "__main__":
    started()
    main()
