-- Renew the lead. KEYS: leader. ARGV: P, epoch, owner -> server TIME in ms
allow_when_full()
local leader = P .. 'leader'
if not is_leader(ARGV[2]) or redis.call('HGET', leader, 'owner') ~= ARGV[3] then return fenced('epoch') end
redis.call('HINCRBY', leader, 'beat', 1)
return milliseconds()
