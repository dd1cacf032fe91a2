"""A downstream and what guards its calls: the object in `service`, its admission in `guarding`, its store in `desk`."""
