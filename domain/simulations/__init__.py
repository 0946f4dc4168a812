"""Simulations: a draft rule set, run against past events. Contract: README.md "Simulations", rules-and-events.md 7.6.

The events are applied by the same in-memory engine as real ones, to worlds that nobody writes to the ledger, the state
or the budgets: what a simulation has made of each holder is kept in rows of its own. A batch of events is one
transaction, so a crash loses nothing and doubles nothing. docs/simulations.md.

    records.py     the row of a simulation: made, begun, listed, cancelled, ended
    rule_sets.py   what is asked for -> the rules that run, fixed when the simulation is made
    past.py        the events in the order in which they took effect
    holders.py     what a holder has in a simulation, as it is kept between two batches
    beginnings.py  what a holder had when the range begins, told from the ledger and the state history
    meanwhile.py   what others did in the meantime, done again: API calls, other programs, events that are left out
    dues.py        what falls due by itself: maturities, expiries, ends of holds
    stage.py       everything that one batch may reach; playing it
    tallies.py     figures per rule, the same for what was simulated and for what really happened
    batches.py     one batch in one transaction
"""
