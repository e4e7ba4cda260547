-- A worker's session begins. KEYS: leader. ARGV: P, wid, state, capacity, wire -> gen
allow_when_full()
local wid, worker, plans = ARGV[2], P .. 'w:' .. ARGV[2], P .. 'plans:' .. ARGV[2]
local gen = redis.call('HINCRBY', P .. 'leader', 'gen', 1)
redis.call('XTRIM', plans, 'MAXLEN', 0) -- plans of earlier sessions; the stream stays, so that its ids grow
redis.call('PERSIST', plans)
redis.call('DEL', worker)
redis.call('HSET', worker, 'gen', gen, 'beat', 0, 'state', ARGV[3], 'capacity', ARGV[4], 'wire', ARGV[5])
redis.call('SADD', P .. 'workers', wid)
redis.call('XADD', P .. 'events', '*', 'k', 'w', 'w', wid, 'g', gen)
return gen
