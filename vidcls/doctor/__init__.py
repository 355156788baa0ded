"""What is looked at on every host before a launch: tools/doctor.py is its command."""
