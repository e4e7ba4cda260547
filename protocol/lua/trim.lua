-- Forget events that the leader has read. KEYS: leader. ARGV: P, epoch, first id to keep
allow_when_full()
if not is_leader(ARGV[2]) then return fenced('epoch') end
return redis.call('XTRIM', P .. 'events', 'MINID', ARGV[3])
