alter table core.idempotency_keys drop constraint idempotency_key;
drop function core.check_idempotency_key(text);
