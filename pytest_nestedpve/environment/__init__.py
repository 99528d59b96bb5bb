"""One environment: its settings, facts and connections, the phases and the runner that executes them.

The actions of the packaged phases are in `setup`, the end of an environment is in `teardown`.
"""
