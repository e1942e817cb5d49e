"""Runs of the real trainer, one after the other in one process. lifecycle_worker.py PLAN.json RESULTS.json

PLAN is a list of {name, overrides, ...}: `act: [hook, step, signal or "kill"]` does something in mid-run, `tear: true` cuts
the newest checkpoint first. RESULTS has for each run its status, what it printed, and a hash of weights and moments.
A kill is an exception that no one handles: nothing more is written, as after SIGKILL.
"""

if __name__ == "__main__":
    from lifecycle_runs import main

    main()
