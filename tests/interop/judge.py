"""Judges a fleet by books that are not its own: the provider's, and the API's."""

from collections import Counter, defaultdict
from itertools import pairwise
from math import inf

# What is told of a moment may be a little after it.
SLACK = 1_000_000
# How long a sidecar waits for its store.
TRIES_TO_TELL = 5_000_000
# Who stands still is waited for as long as this; who is cut off from the store may need some more time to say that it is back.
WAITED_FOR = {"stop past the lease": 45_000_000, "cut off past the lease": 30_000_000}


class Judge:
    """What happened, by user and by refresh token."""

    def __init__(self, fleet):
        ledger = fleet.servers.ledger()
        self.fleet, self.uses = fleet, ledger["uses"]
        self.expired, self.mistaken = ledger["expired"], ledger["mistaken"]
        # Those that a user's disconnect has revoked do not count.
        self.revoked = [one for one in ledger["revocations"] if one["by"] == "/token"]
        self.members = {member.entrance: member for member in fleet.members}
        self.renewals = {member.entrance: member.renewals() for member in fleet.members}

    def generations(self):
        return len({(use["family"], use["rotation"]) for use in self.uses})

    def findings(self):
        """Everything that must not be, by name."""
        found = {
            "tokens sent past their end": self.expired,
            "tokens sent for another user": self.mistaken,
            "refresh tokens used twice for no reason": self.unexcused(),
            "families lost and not told, or told and not lost": self.unreported(),
            "users refused who have lost nothing": self.refused_for_nothing(),
        }
        return {what: which for what, which in found.items() if which}

    def second_uses(self):
        """Each with the one before it."""
        by_token = defaultdict(list)
        for use in self.uses:
            by_token[use["family"], use["rotation"]].append(use)
        return [pair for uses in by_token.values() for pair in pairwise(uses)]

    def unexcused(self):
        """Second uses that no kill and no long absence of who made the first explains (C14)."""
        return [pair for pair in self.second_uses() if not self.is_excused(*pair)]

    def is_excused(self, first, second):
        if first["outcome"] != "granted" and self.could_not_be_told(first):
            return True
        kills = (since for what, since, _ in self.troubles(first) if what == "kill")
        was_killed = any(first["at"] - SLACK <= since <= second["at"] for since in kills)
        return was_killed and not self.was_stored(first, second["at"]) or self.was_away(first)

    def could_not_be_told(self, use):
        """The provider's refusal, to the store, which was away. To hear it once more costs nobody anything."""
        troubles = [(since, until) for _, since, until in self.troubles(use)] + self.fleet.outages
        return any(since - SLACK <= use["at"] + TRIES_TO_TELL and use["at"] - SLACK <= until for since, until in troubles)

    def was_away(self, use):
        """In the midst of it, for longer than it is waited for."""
        away = [(since, until) for what, since, until in self.troubles(use) if until - since > WAITED_FOR.get(what, inf)]
        return any(since - SLACK <= use["at"] <= until for since, until in away)

    def troubles(self, use):
        return self.members[use["entrance"]].troubles

    def was_stored(self, use, by):
        return any(stored is not None and use["at"] - SLACK < stored < by for _, stored in self.told(use))

    def told(self, use):
        return self.renewals[use["entrance"]][use["user"]]

    def unreported(self):
        """Users of whom we have cost the provider more families than the store has told of, or fewer.

        Where who used a token first was away so long that another one used it again, and came back, the provider's own
        word is the last one.
        """
        by_us = Counter(one["user"] for one in self.revoked if one["user"] not in self.fleet.guests)
        away = {first["user"] for first, _ in self.second_uses() if self.was_away(first)}
        told = Counter(user for user, reason in self.fleet.losses if reason == "lost_rotation" or user in away)
        return {user: (by_us[user], told[user]) for user in by_us | told if by_us[user] != told[user]}

    def refused_for_nothing(self):
        """Answers that only a lost grant explains, to users who have lost none."""
        lost = {user for user, _ in self.fleet.losses}
        return [(user, status) for user, status in self.fleet.refused if user not in lost]

    def window(self):
        """How long, in microseconds, grants were in danger: from the provider's commit to ours."""
        by_sidecar = defaultdict(list)
        for use in self.uses:
            if use["committed"] is not None:
                by_sidecar[use["entrance"], use["user"]].append(use)
        window = []
        for uses in by_sidecar.values():
            ends = [use["committed"] for use in uses[1:]] + [inf]
            for use, end in zip(uses, ends):
                # None where a kill was quicker.
                told = (stored for obtained, stored in self.told(use) if use["committed"] <= obtained < end)
                if stored := next(told, None):
                    window.append(stored - use["committed"])
        return sorted(window)

    def table(self):
        window, losses = self.window(), Counter(reason for _, reason in self.fleet.losses)
        at = lambda share: window[min(int(len(window) * share), len(window) - 1)]
        outcomes = Counter(use["outcome"] for use in self.uses)
        lines = [
            f"{len(self.fleet.members)} sidecars on {self.fleet.store.name}, {len(self.fleet.users)} users, seed {self.fleet.seed}",
            f"refresh tokens: {self.generations()} generations, {len(self.uses)} uses {dict(outcomes)}, "
            f"{len(self.revoked)} families revoked, reported as {dict(losses)}",
            f"troubles: {dict(self.fleet.counts)}",
            f"answers: {dict(self.fleet.answers.most_common())}",
            f"from the provider's commit to ours, of {len(window)}: "
            f"min {window[0]}, median {at(0.5)}, 99 % within {at(0.99)}, max {window[-1]} us",
        ]
        return "\n    ".join(lines)
