-- What still carries a former name waits for a handler of that name.

drop table core.renames;
