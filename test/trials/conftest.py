import trials


def pytest_terminal_summary(terminalreporter):
    for what, count in sorted(trials.covered.items()):
        terminalreporter.write_line(f"covered {count:6} {what}")
