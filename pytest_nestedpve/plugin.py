"""pytest hooks and fixtures; thin: what they do lives in the modules beside this one."""
