-- Keep an answer for requests that ask for the same. Begins with a write that is refused when the server is out of memory.
-- KEYS: leader. ARGV: P, epoch, key, milliseconds to live, its bytes, most bytes of all answers, fields and values...
-- -> bytes of all answers
local epoch, key, stays, size, most = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if not is_leader(epoch) then return fenced('epoch') end
local now = tonumber(milliseconds())
redis.call('HSET', P .. 'c:' .. key, unpack(ARGV, 7))
redis.call('PEXPIRE', P .. 'c:' .. key, stays)
local known = redis.call('HGET', P .. 'answers:sizes', key)
redis.call('HSET', P .. 'answers:sizes', key, size)
local sum = redis.call('HINCRBY', P .. 'answers:sizes', '*', size - tonumber(known or 0))
redis.call('ZADD', P .. 'answers', string.format('%.0f', now + stays), key)
forget_first(100, string.format('%.0f', now))
for _ = 1, 1000 do
  sum = tonumber(redis.call('HGET', P .. 'answers:sizes', '*'))
  if sum <= most or forget_first(1) == 0 then break end
end
-- the index goes with the last answer
redis.call('PEXPIRE', P .. 'answers', stays + 1000)
redis.call('PEXPIRE', P .. 'answers:sizes', stays + 1000)
return sum
