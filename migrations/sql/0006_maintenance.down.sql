-- Locks: none that anybody could wait for.

drop function core.maintain(text);
drop function core.settle_subscriptions(text);
drop type core.log_position;
