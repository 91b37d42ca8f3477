"""What ``ktops launch`` puts into every Python process that it starts.

``ktops_launch.pth``, installed next to the package, loads ``startup.py`` when the interpreter starts and the
variable KTOPS_LAUNCH is set. It waits for the imports of libraries that ktops integrates with, and changes
them then.
"""
