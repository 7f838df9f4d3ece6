"""The type checker that the suite switches on: beartype, with an int accepted where a float is meant."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
