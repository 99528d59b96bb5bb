"""One environment: its settings, facts and connections, the phases and the runner that executes them.

What the packaged phases do is in `setup`; how an environment ends is in `teardown`.
"""
