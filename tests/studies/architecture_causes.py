from dataclasses import dataclass
@dataclass(frozen=True)
class Cause:
    key: str
    whose: str
    words: str
CAUSES=()
def cause_of(row): return None
