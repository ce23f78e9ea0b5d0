"""The published attack suite: what hostile submissions try, against this installation.

`run_attacks` makes a course, lets every attacker and a few honest neighbours hand in, grades them
all in one go as any class is graded, and then looks: did anybody earn more than the work deserves,
was anything harmed, did every neighbour get what is right? `fewer attack` prints the table.

The attacks are plain submissions, listed by what they attack: `process`, `machine`, `exhaustion`,
`answers`, `notebooks`, `pages`. To add one, write down what it tries, and what its work deserves.
"""

from autograder.attacks.attack import Attack
from autograder.attacks.suite import Outcome, attacks, run_attacks, table

__all__ = ["Attack", "Outcome", "attacks", "run_attacks", "table"]
