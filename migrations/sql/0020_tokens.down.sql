-- Locks: ACCESS EXCLUSIVE on the table. Whoever comes with a token is refused from then on.

drop table core.tokens;
