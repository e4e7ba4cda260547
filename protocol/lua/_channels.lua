-- Reply channels of a request: its value in `live`, names separated by spaces. Shared by accept and attach.
local MOST_CHANNELS = 4

-- Add channel `name` to an unfinished request; names without a subscriber make room. False if there is none.
local function add_channel(rid, name)
  local current = redis.call('HGET', P .. 'live', rid)
  if not current then return true end -- it has ended: everything is in its journals
  local names = {}
  for known in string.gmatch(current, '%S+') do
    if known == name then return true end
    names[#names + 1] = known
  end
  if #names >= MOST_CHANNELS then
    local heard = {}
    for _, known in ipairs(names) do
      local count = redis.pcall('PUBSUB', NUMSUB, P .. 'out:' .. known)
      if count.err or count[2] > 0 then heard[#heard + 1] = known end
    end
    names = heard
  end
  if #names >= MOST_CHANNELS then return false end
  names[#names + 1] = name
  redis.call('HSET', P .. 'live', rid, table.concat(names, ' '))
  return true
end
