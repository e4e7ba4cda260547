-- A worker's beat that no commit carries; a change of state is an event. States only go forward within one gen, so that
-- a call that was given up and is executed late cannot take one back.
-- KEYS: leader. ARGV: P, wid, gen, state, capacity ('' = unchanged) -> the current epoch
allow_when_full()
local wid, worker = ARGV[2], P .. 'w:' .. ARGV[2]
if not is_worker(wid, ARGV[3]) then return fenced('gen') end
redis.call('HINCRBY', worker, 'beat', 1)
if ARGV[5] ~= '' then redis.call('HSET', worker, 'capacity', ARGV[5]) end
local RANK = { loading = 1, warming = 2, serving = 3, draining = 4 }
if ARGV[4] ~= '' and (RANK[ARGV[4]] or 0) > (RANK[redis.call('HGET', worker, 'state')] or 0) then
  redis.call('HSET', worker, 'state', ARGV[4])
  redis.call('XADD', P .. 'events', '*', 'k', 'w', 'w', wid, 'g', ARGV[3])
end
return tonumber(redis.call('HGET', P .. 'leader', 'epoch') or 0)
