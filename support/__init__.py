"""What a run needs besides the method: settings, files, processes, signals, logs."""
