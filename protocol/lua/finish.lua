-- End choices that no worker runs, and answer an inbox entry. Fenced on the epoch alone.
-- KEYS: leader. ARGV: P, epoch, retention, entry id ('' = none), number of dead letter arguments,
--       dead letter fields and values..., rows...
-- -> one verdict per row
allow_when_full()
local epoch, entry, dead = ARGV[2], ARGV[4], tonumber(ARGV[5])
if not is_leader(epoch) then return fenced('epoch') end
local verdicts, landed = land_rows(6 + dead, ARGV[3])
local taken = 0
if entry ~= '' then
  redis.call('XACK', P .. 'jobs', 'scheduler', entry)
  taken = redis.call('XDEL', P .. 'jobs', entry)
end
if dead > 0 and landed + taken > 0 then
  redis.pcall('XADD', P .. 'dead', 'MAXLEN', '~', '1000', '*', unpack(ARGV, 6, 5 + dead))
end
return verdicts
