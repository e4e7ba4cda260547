-- Close the inbox of a shard that has drained, for good: whoever pushes there from now on gets an error.
-- KEYS: jobs. ARGV: P -> 1 closed, 0 there is work left
allow_when_full()
local jobs = P .. 'jobs'
if redis.call('TYPE', jobs).ok == 'string' then return 1 end
if redis.call('XLEN', jobs) > 0 or redis.call('HLEN', P .. 'live') > 0 or redis.call('XLEN', P .. 'moving') > 0 then
  return 0
end
redis.call('DEL', jobs)
redis.call('SET', jobs, 'this shard is retired')
return 1
