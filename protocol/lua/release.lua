-- Hand the lead over: a leader without an owner may be followed at once. KEYS: leader. ARGV: P, epoch, owner
allow_when_full()
local leader = P .. 'leader'
if not is_leader(ARGV[2]) or redis.call('HGET', leader, 'owner') ~= ARGV[3] then return 0 end
redis.call('HSET', leader, 'owner', '')
return 1
