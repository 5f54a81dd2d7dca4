"""Everything that runs inside a guest: door, SynIC and VMBus halves, the NetVSC driver, the netns guest
and its agent."""
