-- Put a request back into the inbox whose entry somebody has deleted (a producer's XADD with MAXLEN trims what is others').
-- KEYS: leader. ARGV: P, epoch, rid -> 1, or 0: it was admitted or has ended
allow_when_full()
if not is_leader(ARGV[2]) then return fenced('epoch') end
local v = redis.call('HMGET', P .. 'r:' .. ARGV[3], 'open', 'seed')
if not v[1] or v[1] == '0' or v[2] then return 0 end
redis.call('XADD', P .. 'jobs', '*', 'rid', ARGV[3])
return 1
